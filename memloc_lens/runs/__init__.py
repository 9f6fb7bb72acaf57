"""What commands share: the run folder, jobs, settings, the command line and statistics."""
