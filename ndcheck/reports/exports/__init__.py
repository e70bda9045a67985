"""What a run measured, for spreadsheets and data frames."""
