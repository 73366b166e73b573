"""What a step minimises: one file per objective, chosen by the setting `objective`."""
