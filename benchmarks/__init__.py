"""Speed and memory as ratios against a peer, measured in one run, with equal results shown beside them."""
