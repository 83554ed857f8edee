"""What is read back from built GPU binaries: entries, parameters, resources, instructions."""
