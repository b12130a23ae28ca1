"""The runtime: rewires the masks of a module while the user's loop trains it."""
