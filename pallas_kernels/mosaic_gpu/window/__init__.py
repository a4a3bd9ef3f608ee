"""Narrow windows: a query tile sees its own key tile and up to four before it, all at once."""
