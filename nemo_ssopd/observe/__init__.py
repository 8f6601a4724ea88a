"""What people look at: sinks, report, model card, profiles."""
