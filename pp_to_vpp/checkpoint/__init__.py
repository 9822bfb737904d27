"""From the object graphs of rank files to one logical model; opens nothing."""
