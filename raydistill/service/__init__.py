"""From a distilled student to videos over HTTP: bundles, jobs, samplers. Knows no cluster."""
