"""Records of what operations moved and waited for; warnings of whom they wait for now."""
