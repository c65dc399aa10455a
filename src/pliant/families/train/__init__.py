"""What training methods share: losses at other weights, dropped units, chosen samples."""
