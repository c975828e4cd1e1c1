"""BoGo, BoringSSL's protocol tests: a shim for hybridkex, and a command that runs the suite."""
