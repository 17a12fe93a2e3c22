"""What every room uses: errors, files, embedded assets."""
