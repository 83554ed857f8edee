"""How a kernel is called: the recipe, its expressions, and what they come to for given sizes."""
