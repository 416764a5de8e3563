"""New months on a posterior and forecasts from it: series, fields and box means, figures, and what the commands do."""
