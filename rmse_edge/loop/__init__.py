"""What a looped model is: the contract, the loop, and when it stops."""
