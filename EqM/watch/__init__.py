"""What one looks at while a run trains; nothing here changes the run."""
