"""Output for people: metric sinks, report, model card, profiles."""
