"""C++ for CPUs, built to shared objects."""
