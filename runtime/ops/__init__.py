"""How the runtime serves each op: one module per op, loaded when it is asked for (``registry``)."""
