"""What each job takes: one frozen dataclass per job, read by `load`; torch and Ray are not imported."""
