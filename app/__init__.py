"""The workstation: command line, Textual App, screens, commands."""
