"""Checks of the machine, the installation and the inputs, each with how to mend what it finds."""
