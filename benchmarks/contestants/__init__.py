"""What is timed. Each module is the program of a child process; it imports its engine itself."""
