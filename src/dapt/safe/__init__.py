"""The one room that mistrusts bytes: what reads, or replaces, a file that anybody may have made."""
