"""Parts of a GPU session, one module each: ``run(prepared, tell)`` tells its result whenever it knows more."""
