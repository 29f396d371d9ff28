"""What people start: the command line. The only layer that parses arguments, prints and exits."""
