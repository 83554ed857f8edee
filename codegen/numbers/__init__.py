"""Number formats: element types, precisions of weights, packed layouts, rounding."""
