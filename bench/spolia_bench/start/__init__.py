"""`spolia bench start`: how soon a cluster serves, and how much memory its nodes take."""
