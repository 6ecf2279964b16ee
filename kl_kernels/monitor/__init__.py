"""Watching a policy drift from its reference: alarms, constraints, audit. Knows no trainer."""
