"""Ways of tuning beside P-Tuning v2, what each of them saves, and loading any of it onto a base."""
