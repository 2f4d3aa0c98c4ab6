"""Process rewards for other training libraries."""
