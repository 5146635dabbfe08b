"""How a step is taken: precision, optimizer, averages, and what makes the network faster from outside."""
