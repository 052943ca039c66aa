"""What a run would need, before a machine is rented."""
