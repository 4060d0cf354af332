"""What `launch.plan` prints, and what finished runs say beside its predictions."""
