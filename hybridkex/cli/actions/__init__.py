"""What the commands do: a module for each, which is loaded when the command runs."""
