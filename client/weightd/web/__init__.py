"""`weightd web`: a server on the loopback interface that shows one user what the daemon holds, and changes nothing."""
