"""What people are told: tables, comparisons, costs."""
