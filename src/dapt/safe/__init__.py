"""The one room that mistrusts bytes: files, weights, pickles."""
