"""What a step minimises: one file an objective, chosen by the setting `objective`."""
