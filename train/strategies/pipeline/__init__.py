"""Pipeline parallelism: stages and schedules."""
