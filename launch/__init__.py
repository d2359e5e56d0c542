"""How processes start. Nothing here imports torch: a login node need not have it loaded to check and submit."""
