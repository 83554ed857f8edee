"""What users import: experts, gates, attention, prepared weights."""
