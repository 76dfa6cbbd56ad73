"""The one generation loop and everything that plugs into it."""
