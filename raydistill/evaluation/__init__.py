"""Videos -> figures with intervals, and a report. Knows neither Ray nor training."""
