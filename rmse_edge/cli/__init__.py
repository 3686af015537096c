"""The verbs. Each file parses its flags, calls one library function and prints; `common` holds what they share."""
