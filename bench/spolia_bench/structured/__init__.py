"""What a constraint costs a decode step."""
