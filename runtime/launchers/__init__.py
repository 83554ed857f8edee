"""How artifacts become functions that this process can call: one module for each kind."""
