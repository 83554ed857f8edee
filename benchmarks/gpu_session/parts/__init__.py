"""Parts of a GPU session, one module each: ``run(prepared, tell, repeats)`` tells its result whenever it knows more."""
