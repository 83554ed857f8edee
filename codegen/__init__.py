"""What can be generated: ops, archs, spaces, rendering and building."""
