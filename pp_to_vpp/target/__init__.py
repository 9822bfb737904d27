"""From a logical model and a wanted layout to plans of files; opens nothing."""
