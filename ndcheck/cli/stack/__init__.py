"""From options to exit codes, of the commands about the machine and its versions."""
