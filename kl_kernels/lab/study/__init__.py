"""The reward-hacking study: PPO with many KL penalties, and a report of what they did."""
