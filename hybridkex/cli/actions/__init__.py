"""The actions of the commands: one module each, loaded when the command runs."""
